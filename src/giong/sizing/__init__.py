"""Arithmetic before spending: memory, time and cost from shapes, tables and measured points. It never loads a model."""
