"""The author's writing: imported, cleaned, cut, split, and given the requests that would have led to it."""
