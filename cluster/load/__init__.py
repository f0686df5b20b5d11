"""Open-loop load: requests leave at their times, however the server fares."""
