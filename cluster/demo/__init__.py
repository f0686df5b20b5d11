"""``python -m cluster.demo``: a real cluster on this machine, real prompts, a measured report."""
