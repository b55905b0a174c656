"""Small backbones in LLaDA's or Dream's format, from scratch."""
