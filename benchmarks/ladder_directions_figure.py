def draw(found): raise SystemExit("no figure yet")
