def write_report(results, folder):
    pass
