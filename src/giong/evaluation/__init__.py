"""Measuring every arm of a comparison by one code path: style, meaning, fluency, and the gates that guard them."""
