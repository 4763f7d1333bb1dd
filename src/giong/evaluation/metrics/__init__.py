"""The measures, one file per question: how much, how repetitive and how copied (text), is it said (meaning), whose voice
is it (style), how sure is that (intervals). They see texts and numbers only, never a model.
"""
