# The image of an app made from this stack: todol, or the one that APP names. About 60 MB above its Python base, for
# amd64 and arm64, with or without backups to object storage.
#   docker build -t todol . && docker run -p 8080:8080 -v todol:/data todol
#   docker build -t chat --build-arg APP=chat .         # of the chat.py beside this file
FROM litestream/litestream:0.5.17-scratch AS litestream

FROM python:3.14-slim-trixie
# The versions are those of the block at the top of todol.py. /data belongs to the user that the app runs as; so does a
# new Docker volume that is mounted there. PACKAGES: more of them, for DATABASE_URL "psycopg[binary]==3.3.9".
ARG PACKAGES=
# hadolint ignore=SC2086,DL3013
RUN pip install --no-cache-dir bottle==0.13.4 gevent==26.9.0 gevent-websocket==0.10.1 ${PACKAGES} \
 && useradd --uid 10001 --home-dir /data --create-home app
# PORT: the same as internal_port in fly.toml. DATA: here as in litestream.yml.
ARG APP=todol
ENV APP=${APP} DATA=/data HOST=0.0.0.0 PORT=8080 PYTHONPATH=/app
WORKDIR /app
# `app` runs the app on its data, whatever its name and so its settings are called: as the service, and from outside as
# `docker exec CONTAINER app check`. Litestream makes the checkpoints if there is a bucket.
# hadolint ignore=SC2016
RUN printf '%s\n' '#!/bin/bash' \
    'export "${APP^^}_ENV=production" "${APP^^}_DATA=$DATA" "${APP^^}_LITESTREAM=${BUCKET_NAME:+on}"' \
    'exec python -m "$APP" "$@"' > /usr/local/bin/app \
 && chmod +x /usr/local/bin/app
COPY --from=litestream /usr/local/bin/litestream /usr/local/bin/
COPY litestream.yml /etc/
COPY ${APP}.py ./
RUN python -m compileall -q .
USER 10001
EXPOSE 8080

# Without BUCKET_NAME: the app alone. With it, four steps, each of which ends the start if it fails:
#   1. A variable that is empty says so; it does not mean "no backups".
#   2. Fetch the databases that are not here (all of them on a new machine, none on a volume). A bucket that does not
#      answer is no empty bucket: an app that started empty would write over its own backup.
#   3. Create what was in neither place, and copy once: keys that can't write are found now, not when they are needed.
#      Litestream can't copy a cache that was torn on a volume; to open the files sets it aside.
#   4. Litestream starts the app, copies while it runs, and passes signals on.
# `exec` makes it, or the app, the process that gets the signals. Until then the shell has them: as process 1 it would
# ignore them without a trap, and a trap waits for a command in the foreground; so each runs in the background.
CMD ["sh", "-euc", "\
  if [ -z \"${BUCKET_NAME+set}\" ]; then exec app; fi; \
  : \"${BUCKET_NAME:?is empty. Unset it to run without backups}\" \
    \"${AWS_ACCESS_KEY_ID:?is empty, and BUCKET_NAME is set}\" \
    \"${AWS_SECRET_ACCESS_KEY:?is empty, and BUCKET_NAME is set}\"; \
  step() { \"$@\" & child=$!; wait \"$child\"; }; \
  trap 'kill \"${child-}\" 2>/dev/null || :; exit 143' TERM; \
  trap 'kill \"${child-}\" 2>/dev/null || :; exit 130' INT; \
  for file in production production_cache production_job; do \
    step litestream restore -if-db-not-exists -if-replica-exists \"$DATA/$file.sqlite3\"; \
  done; \
  for file in production production_cache production_job; do \
    [ -e \"$DATA/$file.sqlite3\" ] || step app migrate; \
  done; \
  step litestream replicate -once || { step app migrate; step litestream replicate -once; }; \
  exec litestream replicate -exec app"]
