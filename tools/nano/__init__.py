"""Training: rendered scenes -> losses -> weights; and figures of what was learnt."""
