"""What is known of a captured graph: token axes, attentions, masks, outputs."""
