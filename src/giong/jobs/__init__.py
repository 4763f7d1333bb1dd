"""Starting workers and following them. The store and the queue come with the job API."""
