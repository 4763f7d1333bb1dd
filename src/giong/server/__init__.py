"""The HTTP side: OpenAI's API over the model process. Never imports torch; the model process may die without taking it along."""
