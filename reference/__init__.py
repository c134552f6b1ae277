"""A small trained mixture-of-experts model, the text it learnt from and the scripts that made it."""
