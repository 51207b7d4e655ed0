"The studies of the source documents, a command each: `python -m experiments NAME`, from a clone of the repository."
