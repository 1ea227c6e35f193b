from sharding.rooms import check_rooms

check_rooms()
