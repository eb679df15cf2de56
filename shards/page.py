from pathlib import Path
def write(folder): return Path(folder)/"report"/"index.html"
