"""Send a merged model to the Hub: the whole folder at once, or shard by shard while it is made."""
