-- What the first layout holds after five writes and an erasure; see README.md.
CREATE TABLE public.layered_store_history (
    digest bytea NOT NULL,
    version bigint NOT NULL,
    write_id bytea NOT NULL,
    recorded_at bigint NOT NULL,
    payload bytea
);
CREATE TABLE public.layered_store_latest (
    digest bytea NOT NULL,
    user_id text,
    version bigint NOT NULL,
    erased_version bigint,
    erased_at bigint,
    purge_at bigint,
    debts text,
    "position" bigint NOT NULL,
    payload bytea,
    write_id bytea,
    updated_at_unix_ms bigint
);
CREATE TABLE public.layered_store_latest_counter (
    id bigint NOT NULL,
    "position" bigint NOT NULL
);
INSERT INTO public.layered_store_history VALUES ('\x8e7d36d4c530c0cf85bf8a7bd5dcea94', 1795550948281, '\xd33d0b3455b855a8c9a47268c6cd9659', 1795550948283597, '\x0185a7757365725f6964a3752d31b2757064617465645f61745f756e69785f6d73cf000001935b77d400a6736f75726365ab73656c665f7265706f7274aa636f6e666964656e6365cb3ff0000000000000a46178657381a67761726d7468cb3fd0000000000000');
INSERT INTO public.layered_store_history VALUES ('\x8e7d36d4c530c0cf85bf8a7bd5dcea94', 1795550948282, '\x83b6db9807a785367ab5ff72aec8819a', 1795550948287685, '\x0185a7757365725f6964a3752d31b2757064617465645f61745f756e69785f6d73cf000001935b77d7e8a6736f75726365ab73656c665f7265706f7274aa636f6e666964656e6365cb3ff0000000000000a46178657381a67761726d7468cb3fe0000000000000');
INSERT INTO public.layered_store_history VALUES ('\x8e7d36d4c530c0cf85bf8a7bd5dcea94', 1795550948283, '\xf5e7a5b86085bca603427ac8f46e17ee', 1795550948289710, '\x0185a7757365725f6964a3752d31b2757064617465645f61745f756e69785f6d73cf000001935b77dbd0a6736f75726365ab73656c665f7265706f7274aa636f6e666964656e6365cb3ff0000000000000a46178657381a67761726d7468cb3fe8000000000000');
INSERT INTO public.layered_store_history VALUES ('\xa7db592bf078beebbdd11ce20496e876', 1795550948291, '\x01ecd7159e34ce3b2e2f6d0a62e45c28', 1795550948292158, '\x0185a7757365725f6964a5c3bc6e616cb2757064617465645f61745f756e69785f6d73cf000001935b77d400a6736f75726365ab73656c665f7265706f7274aa636f6e666964656e6365cb3ff0000000000000a46178657381a463616c6dcb3fe0000000000000');
INSERT INTO public.layered_store_latest VALUES ('\x8e7d36d4c530c0cf85bf8a7bd5dcea94', 'u-1', 1795550948283, NULL, NULL, NULL, NULL, 727, '\x0185a7757365725f6964a3752d31b2757064617465645f61745f756e69785f6d73cf000001935b77dbd0a6736f75726365ab73656c665f7265706f7274aa636f6e666964656e6365cb3ff0000000000000a46178657381a67761726d7468cb3fe8000000000000', '\xf5e7a5b86085bca603427ac8f46e17ee', 1732406402000);
INSERT INTO public.layered_store_latest VALUES ('\xa7db592bf078beebbdd11ce20496e876', 'ünal', 1795550948291, NULL, NULL, NULL, NULL, 728, '\x0185a7757365725f6964a5c3bc6e616cb2757064617465645f61745f756e69785f6d73cf000001935b77d400a6736f75726365ab73656c665f7265706f7274aa636f6e666964656e6365cb3ff0000000000000a46178657381a463616c6dcb3fe0000000000000', '\x01ecd7159e34ce3b2e2f6d0a62e45c28', 1732406400000);
INSERT INTO public.layered_store_latest VALUES ('\x742b43f50f131c4352103cb0b6eb9831', NULL, 1795550948294, 1795550948294, 1795550948297567, 1796155748297569, '[]', 730, NULL, NULL, NULL);
ALTER TABLE ONLY public.layered_store_history
    ADD CONSTRAINT layered_store_history_pkey PRIMARY KEY (digest, version);
ALTER TABLE ONLY public.layered_store_history
    ADD CONSTRAINT layered_store_history_write UNIQUE (digest, write_id);
ALTER TABLE ONLY public.layered_store_latest_counter
    ADD CONSTRAINT layered_store_latest_counter_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.layered_store_latest
    ADD CONSTRAINT layered_store_latest_pkey PRIMARY KEY (digest);
CREATE INDEX layered_store_latest_position ON public.layered_store_latest USING btree ("position", digest);
CREATE INDEX layered_store_latest_purge_at ON public.layered_store_latest USING btree (purge_at);
