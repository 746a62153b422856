"""The model card of a merged model."""
