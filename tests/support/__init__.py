"""What tests share: models, machines, servers, and programs that run beside them."""
