"""Routers of a merged model trained a little further, with everything else as it is."""
