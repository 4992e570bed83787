"""One scatter of image features over the placeholders of a prompt: marked, and lowered to a `cat`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import AxisError
from ..plan import PromptPlace
from .arrangement import SEPARATOR, Arrangement, arrangement
from .constant_places import Block
from .lineage import Lineage, lineage
from .marks import ActsOn, Mark, Prompt, Tower, Votes, heard_tokens, visual_tokens, with_separators, with_text
from .nodes import Emitter, ancestors, constant_value, describe, values
from .operators import aten
from .prompt_images import Image, made_of, placeholder, placeholder_blocks, voting
from .tower_output import check_published, not_by_token, projector_nodes, tower_output


class Scatter:
    """One `masked_scatter` of image features into words."""

    def __init__(
        self, prompt: Prompt, node: fx.Node, inputs: Mapping[str, Tensor], *, updates: bool, early: bool = False
    ) -> None:
        self.prompt, self.node, self.inputs, self.updates, self.early = prompt, node, inputs, updates, early
        words, mask, source = node.args
        assert isinstance(words, fx.Node) and isinstance(mask, fx.Node) and isinstance(source, fx.Node)
        self.words, self.mask, self.source = words, mask, source
        self.batch, self.length, self.width = values(words)[0].shape
        self.emit = Emitter(node)
        # An output of the model, say.
        self.others = [user for user in source.users if user is not node]
        self.tower: tuple[fx.Node, Arrangement] | None = None

    def lower(self, acts_on: ActsOn, votes: bool) -> None:
        """Mark the image; see `lower_masked_scatter`."""
        blocks = self._blocks()
        if acts_on == "tower":
            self._lower_features(blocks)
            return
        found = made_of(self.source, int(self.width), needed=votes)
        if votes:
            self._check_members(found)
        if acts_on == "rows":
            with contextlib.suppress(AxisError):
                arranged = arrangement(self.node, self.source, self.batch)
                self.tower = tower_output(self.node, arranged.projected)[0], arranged
        self._mark_images(blocks, found, votes=votes, by_crop=acts_on == "rows")

    def lower_sound(self) -> None:
        """Let sound stand among the words, where it stays."""
        blocks, done, parts = self._blocks(), 0, []
        with self.prompt.module.graph.inserting_before(self.node):
            whole = self.emit(aten.reshape.default, self.source, [self.batch, -1, self.width])
            for start, stop in blocks:
                sound = self.emit(aten.slice.Tensor, whole, 1, done, done + stop - start)
                words = self.emit(aten.slice.Tensor, self.words, 1, start, stop)
                parts.append(self.emit(heard_tokens, sound, words))
                done += stop - start
            self._join(parts, blocks)
        self.prompt.sound.extend(blocks)
        self.prompt.module.graph.erase_node(self.node)

    def _lower_features(self, blocks: list[Block]) -> None:
        """Mark the features: where they leave their tower, if each row of the prompt is one of its tokens (the
        published place); or else the rows that enter the prompt, with the tokens that they are made of."""
        found, why = None, None
        try:
            found = lineage(self.source, int(self.width))
        except AxisError as error:
            why = error
        # What adds to rows of the prompt is behind that place.
        if found is None or (not self.updates and all(len(tokens) < 2 for tokens in found.members)):
            marks = len(self.prompt.marks)
            try:
                return self._where_published(blocks)
            except AxisError as published:
                if found is None:  # else what is made of no token separates those that are
                    raise why or published from published
                del self.prompt.marks[marks:]
        self._check_members(found)
        self._mark_images(blocks, found, votes=True, by_crop=True)

    def _check_members(self, found: Lineage | None) -> None:
        """Rows that are made of the same tokens get the same votes: nothing would decide between them."""
        if found is None:
            raise AxisError(
                f"{describe(self.node)} scatters rows into the prompt, and no attention of a vision tower was found "
                "that tells them apart. `method: fastv` reads the language model's own attention."
            )
        share = len(found.members) // int(self.batch)
        for prompt in range(int(self.batch)):
            rows = found.members[prompt * share : (prompt + 1) * share]
            again = next((place for place, row in enumerate(rows) if row and row in rows[:place]), None)
            if again is not None:
                raise AxisError(
                    f"{describe(self.node)} has the same tokens of the vision tower at several places of the prompt "
                    f"(rows {rows.index(rows[again])} and {again} of the image), and no vote would decide between "
                    "them. `method: fastv` reduces the rows of the prompt."
                )

    def _where_published(self, blocks: list[Block]) -> None:
        found = arrangement(self.node, self.source, self.batch)
        graph = self.prompt.module.graph
        with graph.inserting_before(self.source.next):  # others may read it before the scatter does
            images = self._single_image(found) if len(blocks) == 1 and found.in_place else self._arranged(found, blocks)
            if self.others:
                self._replace_source(images)
        with graph.inserting_before(self.node):
            self._join(images, blocks)
        self.prompt.blocks.extend(blocks)
        graph.erase_node(self.node)

    def _images(self, blocks: list[Block], found: Lineage | None) -> list[Image]:
        """The images of a prompt: a block each; or several blocks that one image is cut into, line by line."""
        images: list[Image] = []
        done = 0
        for start, stop in blocks:
            rows = range(done, done + stop - start)
            owners = self._owners(found, rows)
            done += stop - start
            if images and found is not None and images[-1].owners & owners:
                images[-1].blocks.append((start, stop))
                images[-1].rows.extend(rows)
                images[-1].owners |= owners
            else:
                images.append(Image([(start, stop)], [*rows], owners))
        return images

    def _owners(self, found: Lineage | None, rows: Iterable[int]) -> set[int]:
        if found is None:
            return set()
        owners = found.owners()
        return {owners[token] for row in rows for token in found.members[row]}

    def _mark_images(self, blocks: list[Block], found: Lineage | None, *, votes: bool, by_crop: bool) -> None:
        """Mark the rows of every image: by crop or as a whole, with the tokens that vote for them or without."""
        images, marked, spans = self._images(blocks, found), [], list[Block]()
        with self.prompt.module.graph.inserting_before(self.node):
            whole = self.emit(aten.reshape.default, self.source, [self.batch, -1, self.width])
            for image in images:
                rows = self._span(whole, image)
                crops, members = ((image.places,), None) if found is None else self._voting(image, found)
                spans.append(image.span)
                if not by_crop:
                    crops = (image.places,)
                elif members is not None and self._may_begin_early(image, blocks, crops, members):
                    marked.append(self._from_text(image, rows, members))
                    spans[-1] = image.span[0] - 1, image.span[1]
                    continue
                elif separators := self._separators(image, found):
                    marked.append(self._without_separators(image, rows, separators, crops, members if votes else None))
                    continue
                mark = self.emit(visual_tokens, rows, f"prompt{self._suffix()}")
                about: dict[str, Any] = {"votes": members if votes else None, "tower": self._in_tower(image)}
                self.prompt.marks.append(Mark(mark, rows, None, crops, pinned=image.pinned, enters=True, **about))
                marked.append(mark)
            self._join(marked, spans)
        self.prompt.blocks.extend(spans)
        self.prompt.module.graph.erase_node(self.node)

    def _may_begin_early(
        self, image: Image, blocks: list[Block], crops: tuple[tuple[int, ...], ...], votes: Votes
    ) -> bool:
        """Whether the mark of an image is to begin at the text in front of it, and can: each token is a row of the one
        crop, and what stands in front is no other image."""
        start, whole = image.span[0], crops == (tuple(range(image.length)),)
        return self.early and not votes.by_class and whole and start > 0 and start not in {stop for _, stop in blocks}

    def _from_text(self, image: Image, rows: fx.Node, votes: Votes) -> fx.Node:
        """Mark the rows of an image from the text in front of it on (`Mark.early`)."""
        start = image.span[0]
        rows = self.emit(with_text, self.emit(aten.slice.Tensor, self.words, 1, start - 1, start), rows)
        mark = self.emit(visual_tokens, rows, f"prompt{self._suffix()}")
        members = tuple((*sorted(prompt), prompt[-1]) for prompt in votes.members)
        votes, crop = replace(votes, members=members), tuple(range(image.length))
        self.prompt.marks.append(
            Mark(mark, rows, None, (crop,), votes=votes, pinned=(image.length,), early=True, enters=True)
        )
        return mark

    def _separators(self, image: Image, found: Lineage | None) -> list[int]:
        """Places of an image's span that hold rows which are made of no token (learned marks at the ends of lines)."""
        if found is None:
            return []
        return [p for p, row in zip(image.places, image.rows, strict=True) if not found.members[row]]

    def _without_separators(
        self,
        image: Image,
        rows: fx.Node,
        separators: list[int],
        crops: tuple[tuple[int, ...], ...],
        votes: Votes | None,
    ) -> fx.Node:
        """Mark the rows of an image without the separators, which a reducer drops."""
        suffix = self._suffix()
        order = [place for place in range(image.length) if place not in set(separators)]
        number = {place: i for i, place in enumerate(order)}
        own = self.emit(aten.index_select.default, rows, 1, self._constant(torch.tensor(order)))
        mark = self.emit(visual_tokens, own, f"crops{suffix}")
        whole = self.emit(with_separators, mark, rows, f"prompt{suffix}")
        if votes is not None:
            members = tuple(tuple(prompt[place] for place in order) for prompt in votes.members)
            votes = replace(votes, members=members)
        among = tuple(tuple(number[place] for place in crop) for crop in crops)
        pinned = tuple(number[place] for place in image.pinned)
        origin = tuple(number.get(place, SEPARATOR) for place in range(image.length))
        tower = self._in_tower(image, order)
        self.prompt.marks.append(Mark(mark, own, None, among, whole, origin, votes, pinned, enters=True, tower=tower))
        return whole

    def _in_tower(self, image: Image, places: Sequence[int] | None = None) -> Tower | None:
        """What the rows at some places of an image were in the tower; None where one of them is not one token."""
        if self.tower is None:
            return None
        features, found = self.tower
        number = dict(zip(image.places, image.rows, strict=True))
        order = [int(found.origin[number[p]]) if p in number else SEPARATOR for p in places or range(image.length)]
        count = found.rows * int(values(features)[0].shape[1])
        fits = values(features)[0].shape[0] == found.rows * self.batch and found.tokens * found.rows == count
        return Tower(features, tuple(order), count) if fits and SEPARATOR not in order else None

    def _voting(self, image: Image, found: Lineage) -> tuple[tuple[tuple[int, ...], ...], Votes]:
        return voting(self.node, int(self.batch), image, found)

    def _span(self, whole: fx.Node, image: Image) -> fx.Node:
        """An image's rows, with the text between its blocks."""
        parts, done = [], image.rows[0]
        for number, (start, stop) in enumerate(image.blocks):
            if number:
                parts.append(self.emit(aten.slice.Tensor, self.words, 1, image.blocks[number - 1][1], start))
            parts.append(self.emit(aten.slice.Tensor, whole, 1, done, done + stop - start))
            done += stop - start
        return self.emit(with_text, *parts) if len(parts) > 1 else parts[0]

    def _blocks(self) -> list[Block]:
        """Where the image stands, in every prompt alike.

        Raises:
            AxisError: that is open, or its features do not fit there.
        """
        given = values(self.source)[0]
        if not all(isinstance(size, int) for size in (self.batch, self.length, *given.shape)):
            raise AxisError(
                f"{describe(self.node)} scatters image features whose number depends on data; a prompt of one form has "
                "a fixed number of them. Let the model keep all features of an image, with none chosen by a mask, or "
                "compile a part without it (--component, --outputs)."
            )
        filled = constant_value(self.mask, self.inputs)
        if filled is None:
            raise AxisError(f"{describe(self.node)} fills places whose number is open; an image needs a fixed place.")
        blocks = placeholder_blocks(self.node, filled)
        places = sum(stop - start for start, stop in blocks)
        if given.numel() != self.batch * places * self.width:
            raise AxisError(
                f"{describe(self.node)} fills {places} placeholders in each prompt, and the image features "
                f"{tuple(given.shape)} do not fit them."
            )
        known = placeholder(self.mask, self.inputs, filled)
        if known is not None:
            self.prompt.places.extend(PromptPlace(*known, start, stop) for start, stop in blocks)
        return blocks

    def _suffix(self) -> str:
        """Blocks side by side (in an output of the model) must not be taken for one stream."""
        number = len(self.prompt.marks)
        return f"_{number + 1}" if number else ""

    def _join(self, images: list[fx.Node], blocks: list[Block]) -> None:
        """Words and images side by side, in place of the scatter."""
        parts, position = [], 0
        for image, (start, stop) in zip(images, blocks, strict=True):
            if position < start:
                parts.append(self.emit(aten.slice.Tensor, self.words, 1, position, start))
            parts.append(image)
            position = stop
        if position < self.length:
            parts.append(self.emit(aten.slice.Tensor, self.words, 1, position, self.length))
        self.node.replace_all_uses_with(self.emit(aten.cat.default, parts, 1))

    def _replace_source(self, images: list[fx.Node]) -> None:
        """Let everything else that reads the source see the same tokens, without the batch taken apart."""
        whole = self.emit(aten.cat.default, images, 1) if len(images) > 1 else images[0]
        shape = [-1, self.width] if values(self.source)[0].dim() == 2 else [self.batch, -1, self.width]
        rows = self.emit(aten.view.default, whole, shape) if len(shape) == 2 else whole
        for user in self.others:
            user.replace_input_with(self.source, rows)

    # --- one row for each prompt, as it is ----------------------------------------------------------------------

    def _single_image(self, found: Arrangement) -> list[fx.Node]:
        features, user = tower_output(self.node, found.projected)
        check_published(features)
        behind = ancestors(self.source) | {self.source}
        with self.prompt.module.graph.inserting_after(features):
            mark = Emitter(user)(visual_tokens, features)
        for reader in [u for u in features.users if u is not mark and u in behind]:
            reader.replace_input_with(features, mark)
        self.prompt.marks.append(Mark(mark, features, None, (tuple(range(found.tokens)),)))
        return [self._cast(found.projected)]

    def _cast(self, image: fx.Node) -> fx.Node:
        dtype = values(self.source)[0].dtype
        return image if values(image)[0].dtype == dtype else self.emit(aten.to.dtype, image, dtype)

    # --- tokens of several rows, or rearranged ------------------------------------------------------------------

    def _arranged(self, found: Arrangement, blocks: list[Block]) -> list[fx.Node]:
        features, _ = tower_output(self.node, found.projected)
        check_published(features)
        projector = projector_nodes(self.node, features, found.projected)
        images, done = [], 0
        seen: set[int] = set()
        for start, stop in blocks:
            origin = found.origin[done : done + stop - start]
            rows = set((origin[origin != SEPARATOR] // found.tokens).tolist())
            if seen & rows:
                raise AxisError(
                    f"{describe(self.node)} puts the tokens of one image into several blocks of the prompt (up to "
                    f"position {stop}), with words between. An image is reduced as a whole: give it one block."
                )
            seen |= rows
            images.append(self._block(found, features, projector, origin, done))
            done += stop - start
        return images

    def _block(
        self, found: Arrangement, features: fx.Node, projector: list[fx.Node], origin: Tensor, offset: int
    ) -> fx.Node:
        """The image of one block: its tokens in order, through the projector, and its separators."""
        order = origin[origin != SEPARATOR]
        if len(order) == 0:
            raise AxisError(f"{describe(self.node)} fills a block of the prompt with separators alone.")
        own = self.emit(aten.reshape.default, features, [self.batch, found.rows * found.tokens, -1])
        suffix = self._suffix()
        place = f"crops{suffix}" if len(order) < len(origin) else f"prompt{suffix}"
        mark = self.emit(visual_tokens, self.emit(aten.index_select.default, own, 1, self._constant(order)), place)
        image = self._cast(self._project(projector, features, mark, len(order)))
        rows = (order // found.tokens).tolist()
        by_token = order.argsort().tolist()
        crops = tuple(tuple(p for p in by_token if rows[p] == row) for row in dict.fromkeys(rows))
        if len(order) == len(origin):
            self.prompt.marks.append(Mark(mark, features, tuple(order.tolist()), crops))
            return image
        whole = self.emit(aten.reshape.default, self.source, [self.batch, -1, self.width])
        whole = self.emit(aten.slice.Tensor, whole, 1, offset, offset + len(origin))
        separated = self.emit(with_separators, image, whole, f"prompt{suffix}")
        numbers = (origin != SEPARATOR).cumsum(0) - 1
        among = tuple(torch.where(origin == SEPARATOR, SEPARATOR, numbers).tolist())
        self.prompt.marks.append(Mark(mark, features, tuple(order.tolist()), crops, separated, among))
        return separated

    def _project(self, projector: list[fx.Node], features: fx.Node, mark: fx.Node, tokens: int) -> fx.Node:
        """The projector once more, for the tokens of one block."""
        copies = {features: mark}
        for node in projector:
            # Keywords stay as they are; values follow the new shape.
            copies[node] = self.emit(
                node.target, *fx.map_arg(node.args, lambda n: copies.get(n, n)), **dict(node.kwargs)
            )
            copies[node].meta.update({k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")})
            shape = values(copies[node])[0].shape
            if list(shape[:2]) != [self.batch, tokens]:
                raise not_by_token(self.node, node)
        return copies[projector[-1]] if projector else mark

    def _constant(self, numbers: Tensor) -> fx.Node:
        module = self.prompt.module
        name = f"_prompt_order_{len(self.prompt.marks)}"
        numbers = numbers.to(values(self.words)[0].device)
        module.register_buffer(name, numbers, persistent=False)
        node = module.graph.get_attr(name)
        mode = values(self.words)[0].fake_mode  # type: ignore[attr-defined]  # of a fake tensor
        node.meta["val"] = mode.from_tensor(numbers, static_shapes=True)
        return node
