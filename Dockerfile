# The image of todol: about 60 MB above its Python base, for amd64 and arm64, with or without backups to object storage.
#   docker build -t todol . && docker run -p 8080:8080 -v todol:/data todol
FROM litestream/litestream:0.5.17-scratch AS litestream

FROM python:3.14-slim-trixie
# PORT: the same as internal_port in fly.toml. TODOL_ENV and TODOL_DATA name the files, here as in litestream.yml.
ENV HOST=0.0.0.0 PORT=8080 TODOL_ENV=production TODOL_DATA=/data
WORKDIR /app
# The versions are those of the block at the top of todol.py. /data belongs to the user that todol runs as; so does a
# new Docker volume that is mounted there.
RUN pip install --no-cache-dir bottle==0.13.4 gevent==26.9.0 gevent-websocket==0.10.1 \
 && useradd --uid 10001 --home-dir /data --create-home todol
COPY --from=litestream /usr/local/bin/litestream /usr/local/bin/
COPY litestream.yml /etc/
COPY todol.py ./
RUN python -m compileall -q todol.py
USER 10001
EXPOSE 8080

# Without BUCKET_NAME: todol alone. With it, four steps, each of which ends the start if it fails:
#   1. A variable that is empty says so; it does not mean "no backups".
#   2. Fetch the databases that are not here (all of them on a new machine, none on a volume). A bucket that does not
#      answer is no empty bucket: an app that started empty would write over its own backup. A cache that todol left open
#      when it ran without a bucket may be torn: todol would begin a new one, but not while Litestream reads it.
#   3. Create what was in neither place, and copy once: keys that can't write are found now, not when they are needed.
#   4. Litestream starts todol, copies while it runs, and passes signals on.
# TODOL_LITESTREAM leaves checkpoints to Litestream. `exec` makes it, or todol, the process that gets the signals.
CMD ["sh", "-euc", "\
  if [ -z \"${BUCKET_NAME+set}\" ]; then exec python -m todol; fi; \
  : \"${BUCKET_NAME:?is empty. Unset it to run without backups}\" \
    \"${AWS_ACCESS_KEY_ID:?is empty, and BUCKET_NAME is set}\" \
    \"${AWS_SECRET_ACCESS_KEY:?is empty, and BUCKET_NAME is set}\"; \
  export TODOL_LITESTREAM=on; \
  cache=\"$TODOL_DATA/${TODOL_ENV}_cache.sqlite3\"; \
  if [ -s \"$cache-boot\" ]; then rm -f \"$cache\" \"$cache\"-*; fi; \
  for role in '' _cache _job; do \
    litestream restore -if-db-not-exists -if-replica-exists \"$TODOL_DATA/$TODOL_ENV$role.sqlite3\"; \
  done; \
  for role in '' _cache _job; do \
    [ -e \"$TODOL_DATA/$TODOL_ENV$role.sqlite3\" ] || python -m todol migrate; \
  done; \
  litestream replicate -once; \
  exec litestream replicate -exec 'python -m todol'"]
