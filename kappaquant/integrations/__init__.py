"""Former names of what lies in ``kappaquant.engines``, which documents and scripts of users import."""
