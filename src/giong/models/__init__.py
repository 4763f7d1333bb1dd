"""Loading base models safely, and turning conversations into token rows. `bundled/` holds the tiny base and its card."""
