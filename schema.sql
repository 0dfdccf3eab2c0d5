-- The tables of chatserver, the same for both engines and safe to run at every start.
-- On Postgres the program reads TEXT as TEXT COLLATE "C" (names sort by byte, as in SQLite).
-- Times are milliseconds since 1970, UTC. Nothing is ever stored that is not text or a whole number.

CREATE TABLE IF NOT EXISTS meta (           -- name 'epoch': changes when a backup is put in place
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
);

CREATE TABLE IF NOT EXISTS users (
    username TEXT PRIMARY KEY,              -- lower case; kept for ever, so that a name is never given again
    email TEXT UNIQUE,                      -- lower case
    password TEXT,                          -- scrypt with its parameters; NULL: the account was deleted
    version BIGINT NOT NULL,                -- every token carries it; raising it voids them all
    created_at BIGINT NOT NULL
);

CREATE TABLE IF NOT EXISTS rooms (
    room_id TEXT PRIMARY KEY,               -- kept for ever, so that an id is never given again
    name TEXT NOT NULL,
    kind TEXT NOT NULL                      -- public, private, direct or deleted
);

INSERT INTO rooms (room_id, name, kind)
VALUES ('1', 'Lobby', 'public') ON CONFLICT (room_id) DO NOTHING;

CREATE TABLE IF NOT EXISTS members (
    room_id TEXT NOT NULL,
    username TEXT NOT NULL,
    role TEXT NOT NULL,                     -- member, moderator, owner or banned
    read_seq BIGINT NOT NULL,               -- the read marker
    PRIMARY KEY (room_id, username)
);

CREATE INDEX IF NOT EXISTS members_by_user ON members (username, room_id);

CREATE TABLE IF NOT EXISTS events (         -- the log, the history and the queue
    room_id TEXT NOT NULL,
    seq BIGINT NOT NULL,                    -- 1, 2, 3 ... in each room, without a gap
    kind TEXT NOT NULL,                     -- message, edit, delete or member
    username TEXT NOT NULL,                 -- who did it
    created_at BIGINT NOT NULL,
    target BIGINT,                          -- edit, delete: the number of the message
    client_id TEXT,                         -- message: the sender's own name for it, by which a retry is known
    folded TEXT,                            -- message: its text without case, for the search; NULL: deleted
    json TEXT NOT NULL,                     -- what clients get
    PRIMARY KEY (room_id, seq)
);

CREATE UNIQUE INDEX IF NOT EXISTS events_by_client ON events (room_id, username, client_id) WHERE client_id IS NOT NULL;

-- Who posts has read what came before: one's newest event that is about no other event is a read mark, too.
CREATE INDEX IF NOT EXISTS events_by_user ON events (username, room_id, seq) WHERE target IS NULL;
