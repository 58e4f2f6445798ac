"""Where the products of the pass are computed: processor or GPU, one process or several."""
