"""Architectures of transformers, each held against its own forward reduced by hand."""

import pytest

pytest.register_assert_rewrite("tests.architectures.suite")
