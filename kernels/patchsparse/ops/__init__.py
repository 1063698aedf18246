"""The registered operators: schema, shape function and gradient; the engines implement them."""
