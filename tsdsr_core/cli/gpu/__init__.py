"""``tsdsr bench --gpu``: everything that is to be known of a GPU, in one run.

``command`` runs the parts within the time, ``parts`` measures them, ``report`` writes the tables.
"""
