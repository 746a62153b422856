"""Evaluate a merged model and its routers: losses beside those of honest baselines."""
