"""Mixtures of experts in place of feed-forwards: routers, grouped weights, balance."""
