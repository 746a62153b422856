"""Train the routers of a merged model a little further, and its norms on request, with everything else frozen."""
