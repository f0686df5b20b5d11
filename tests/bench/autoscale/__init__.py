"""An autoscaled cluster of simulated engines beside one that is always as large as can be."""
