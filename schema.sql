-- The tables of chatserver, the same for both engines and safe to run at every start.
-- On Postgres the program reads TEXT as TEXT COLLATE "C" (names sort by byte, as in SQLite) and drops WITHOUT ROWID.
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
    kind TEXT NOT NULL,                     -- public, private, direct or deleted
    seq BIGINT NOT NULL,                    -- the number of the newest event; the next one is seq + 1
    floor BIGINT NOT NULL,                  -- events up to this number have expired
    created_by TEXT,
    created_at BIGINT NOT NULL
);

INSERT INTO rooms (room_id, name, kind, seq, floor, created_by, created_at)
VALUES ('1', 'Lobby', 'public', 0, 0, NULL, 0) ON CONFLICT (room_id) DO NOTHING;

CREATE TABLE IF NOT EXISTS members (
    room_id TEXT NOT NULL,
    username TEXT NOT NULL,
    role TEXT NOT NULL,                     -- member, moderator, owner or banned
    read_seq BIGINT NOT NULL,               -- the read marker
    since BIGINT NOT NULL,                  -- the number of the event that let them in
    PRIMARY KEY (room_id, username)
);

CREATE INDEX IF NOT EXISTS members_by_user ON members (username, room_id);

CREATE TABLE IF NOT EXISTS events (         -- the log, the history and the queue
    room_id TEXT NOT NULL,
    seq BIGINT NOT NULL,                    -- 1, 2, 3 ... in each room, without a gap
    kind TEXT NOT NULL,                     -- message, edit, delete, member or room
    username TEXT NOT NULL,                 -- who did it
    target BIGINT,                          -- edit, delete: the number of the message
    member TEXT,                            -- member: to whom
    role TEXT,                              -- member: the new role; NULL: left or removed
    name TEXT,                              -- room: the new name
    message TEXT,                           -- message: its present text; NULL: deleted. No other row holds text
    folded TEXT,                            -- message: the text without case, for the search
    created_at BIGINT NOT NULL,
    edited_at BIGINT,
    client_id TEXT,                         -- message: the sender's own name for it, by which a retry is known
    PRIMARY KEY (room_id, seq)
) WITHOUT ROWID;

CREATE UNIQUE INDEX IF NOT EXISTS events_by_client ON events (room_id, username, client_id) WHERE client_id IS NOT NULL;

-- What the count of unread messages leaves out: one's own, and events that are no message (or no more).
CREATE INDEX IF NOT EXISTS events_by_user ON events (room_id, username, seq) WHERE message IS NOT NULL;

-- The last statement: where its index is, all has been run.
CREATE INDEX IF NOT EXISTS events_silent ON events (room_id, seq) WHERE message IS NULL;
