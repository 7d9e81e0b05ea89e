"""The functional forms of the loss, and the solver that fits them."""
