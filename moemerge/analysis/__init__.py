"""A closer look into a mixture: what its weights and its text say of experts and routers."""
