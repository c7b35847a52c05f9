"""A config put to work: what it builds, one training step, and the judging of what was learned."""
