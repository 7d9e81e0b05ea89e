"""Tasks on images: made, made anew, and told apart."""
