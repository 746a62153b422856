"""How good a merged model is, and whether its routers earn their place: losses beside those of honest baselines."""
