from privkd.siblings import load_siblings

load_siblings("attacks")
