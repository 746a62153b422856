"""Train the routers of a merged model a little further, with everything else frozen."""
