"The studies of the source documents, a command each: `python -m fastai_lsuv.experiments NAME`."
