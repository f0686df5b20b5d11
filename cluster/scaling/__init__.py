"""One policy that sizes target and draft pools together, and what connects it to Ray Serve."""
