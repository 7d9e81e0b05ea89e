"""From a sweep's runs to a table, plots, the next config, and the score of its predictions."""
