"""Serve deployments: a request from socket to tokens."""
