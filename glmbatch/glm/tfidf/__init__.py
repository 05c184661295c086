"""TF-IDF and logistic regression as a model of a job: the baseline of a training."""
