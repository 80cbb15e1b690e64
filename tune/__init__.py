"""Sweeps: Ray Tune and Optuna over methods and their settings. A checkout keeps it here, a wheel as `raysemi.tune`.

sweep.py     what a sweep's YAML file says
spaces.py    which settings a trial draws
checks.py    a sweep's settings -> its space, and all that is wrong with it
study.py     what has been tried: Optuna's storage, which survives every death
storage.py   the database of a study
search.py    Tune's searcher and scheduler over that storage
trial.py     what a trial does
driver.py    a sweep from its start to its end
show.py      tables on a terminal
report.py    the page and the CSV file
sweeps/      ready sweeps
"""
