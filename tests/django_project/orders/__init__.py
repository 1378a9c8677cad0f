"""The app that has the models and the tasks."""
