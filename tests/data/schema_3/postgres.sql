-- What the third layout holds after four writes of three users and an erasure; see README.md.
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
INSERT INTO public.layered_store_history VALUES ('\x8e7d36d4c530c0cf85bf8a7bd5dcea94', 1796021018645, '\x41c440ab3f14ce13c8206a4b8f6c4a85', 1796021018645287, '\x85a7757365725f6964a3752d31b2757064617465645f61745f756e69785f6d73cf000001935b77d400a6736f75726365ab73656c665f7265706f7274aa636f6e666964656e6365cb3ff0000000000000a46178657381a67761726d7468cb3fd0000000000000');
INSERT INTO public.layered_store_history VALUES ('\x8e7d36d4c530c0cf85bf8a7bd5dcea94', 1796021018646, '\x7794b920711872291a14f556ae2c96a9', 1796021018646079, '\x85a7757365725f6964a3752d31b2757064617465645f61745f756e69785f6d73cf000001935b77d7e8a6736f75726365ab73656c665f7265706f7274aa636f6e666964656e6365cb3ff0000000000000a46178657381a67761726d7468cb3fe0000000000000');
INSERT INTO public.layered_store_history VALUES ('\x8e7d36d4c530c0cf85bf8a7bd5dcea94', 1796021018647, '\x8ef856ddc6d0c6de86432791fbe10e75', 1796021018646596, '\x85a7757365725f6964a3752d31b2757064617465645f61745f756e69785f6d73cf000001935b77dbd0a6736f75726365ab73656c665f7265706f7274aa636f6e666964656e6365cb3ff0000000000000a46178657381a67761726d7468cb3fe8000000000000');
INSERT INTO public.layered_store_history VALUES ('\xa7db592bf078beebbdd11ce20496e876', 1796021018647, '\x3bd49293474d75ecad103325e10e9efc', 1796021018647057, '\x85a7757365725f6964a5c3bc6e616cb2757064617465645f61745f756e69785f6d73cf000001935b77d400a6736f75726365ab73656c665f7265706f7274aa636f6e666964656e6365cb3ff0000000000000a46178657380');
INSERT INTO public.layered_store_history VALUES ('\x742b43f50f131c4352103cb0b6eb9831', 1796021018648, '\x352db63b9b6e14b8e5cc5b42404f0c68', 1796021018652195, NULL);
INSERT INTO public.layered_store_latest VALUES ('\x8e7d36d4c530c0cf85bf8a7bd5dcea94', 'u-1', 1796021018647, NULL, NULL, NULL, NULL, 727, '\x85a7757365725f6964a3752d31b2757064617465645f61745f756e69785f6d73cf000001935b77dbd0a6736f75726365ab73656c665f7265706f7274aa636f6e666964656e6365cb3ff0000000000000a46178657381a67761726d7468cb3fe8000000000000', '\x8ef856ddc6d0c6de86432791fbe10e75', 1732406402000);
INSERT INTO public.layered_store_latest VALUES ('\xa7db592bf078beebbdd11ce20496e876', 'ünal', 1796021018647, NULL, NULL, NULL, NULL, 728, '\x85a7757365725f6964a5c3bc6e616cb2757064617465645f61745f756e69785f6d73cf000001935b77d400a6736f75726365ab73656c665f7265706f7274aa636f6e666964656e6365cb3ff0000000000000a46178657380', '\x3bd49293474d75ecad103325e10e9efc', 1732406400000);
INSERT INTO public.layered_store_latest VALUES ('\x742b43f50f131c4352103cb0b6eb9831', NULL, 1796021018648, 1796021018648, 1796021018649615, 1796625818649615, '[]', 730, NULL, NULL, NULL);
INSERT INTO public.layered_store_latest_counter VALUES (2, 3);
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
