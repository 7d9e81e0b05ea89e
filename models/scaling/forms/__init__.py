"""The functional forms that a fit may assume, and the solver that fits them."""
