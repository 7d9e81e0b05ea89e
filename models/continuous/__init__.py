"""Networks whose state changes continuously, by differential equations."""
