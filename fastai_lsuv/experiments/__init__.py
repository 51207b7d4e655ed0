"The studies of the source documents, one command each: `python -m fastai_lsuv.experiments NAME`."
