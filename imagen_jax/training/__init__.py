"""State, optimizer, step, checkpoint and loop: the same lines for every stage."""
